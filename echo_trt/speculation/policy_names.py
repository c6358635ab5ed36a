"""Names of built-in policies, apart from the planners behind them: many modules need no more than a name."""

PLAIN = "autoregressive"
DEFAULT = "goodput"
EXACT = "goodput-exact"
