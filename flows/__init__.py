"""The DAGs. `retrain` is the parent; `prepare`, `train` and `publish` are its three parts."""
