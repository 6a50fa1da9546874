"""What the subcommands of ``molora`` do; ``molora.cli`` reads their arguments."""
