"""nbgate: an API station in a box, one base URL and one key for every model.

Must stay free of imports: the supervisor and every worker load it first.
"""

__version__ = "0.1.0"
