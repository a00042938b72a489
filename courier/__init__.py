"""What producers and workers share: errors, settings, messages, results, the ledger, batch plans."""

__version__ = "0.2.0.dev0"
