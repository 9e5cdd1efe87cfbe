"""`fedbus doctor`, `fedbus verify` and the checks behind them."""
