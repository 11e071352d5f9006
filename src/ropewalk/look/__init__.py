"""Looking at data. In: prepared or judged documents (data.View). Out: a page, tables, documents, comparisons.

May import: numpy, pyarrow, jinja2, data, clean, files, errors.
"""

from ropewalk.look.make import profile

__all__ = ["profile"]
