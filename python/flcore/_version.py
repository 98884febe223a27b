"""Version of the package; read by setup.py and by flcore itself."""

__version__ = "0.1.0"
