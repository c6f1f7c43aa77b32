"""Where ``torch.compile`` comes in, and the compilers that run the rewritten graphs."""
