"""bitgen: bitwise autoregressive text-to-image models at the command line."""

__version__ = "0.1.0"
