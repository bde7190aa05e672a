"""fastflow: flow-map generative models behind one interface, one trainer, one table of results."""

__version__ = "0.1.0"
