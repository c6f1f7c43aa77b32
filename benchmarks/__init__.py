"""One command per table: `python -m benchmarks.mlp`, from the repository root."""
