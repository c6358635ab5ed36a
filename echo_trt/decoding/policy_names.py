"""Names of the policies, apart from the planners behind them: the command line needs no more than the names."""

PLAIN = "autoregressive"
PAPER = (PLAIN, "static", "dense", "fixed", "echo")
GOODPUT = ("goodput", "goodput-exact", "goodput-head")
NAMES = (*PAPER, *GOODPUT)
SHARED = ("echo", "dense", "fixed")  # these verify up to K_max tokens of the whole batch
