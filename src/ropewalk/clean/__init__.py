"""What is known about texts. In: batches of texts. Out: attributes and spans; no text is changed.

May import: numpy, pyarrow, files, errors; other libraries and rooms inside functions.
"""
