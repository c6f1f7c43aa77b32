"""What every layer shares: errors, options, decisions and the report."""
