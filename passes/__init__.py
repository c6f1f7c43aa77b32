"""The passes over FX graphs, one file each, and the rules and prices they decide by."""
