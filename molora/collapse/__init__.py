"""From a mixture to one adapter: one file per method."""
