"""The custom ops that rewritten graphs call, one file each."""
