"""HTTP interfaces to the models of this machine: `qwenlocal serve`."""
