"""Names of the policies, apart from the planners behind them: the command line needs no more than the names."""

from typing import Literal, get_args

Policy = Literal["autoregressive", "static", "dense", "fixed", "echo", "goodput", "goodput-exact", "goodput-head"]
NAMES: tuple[Policy, ...] = get_args(Policy)
PLAIN: Policy = "autoregressive"
PAPER: tuple[Policy, ...] = ("static", "dense", "fixed", "echo")
GOODPUT: tuple[Policy, ...] = ("goodput", "goodput-exact", "goodput-head")
BUDGETED: tuple[Policy, ...] = ("echo", "dense", "fixed")  # these verify up to K_max tokens of the whole batch
