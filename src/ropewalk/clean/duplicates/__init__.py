"""What is in the data twice. In: texts, and what `map` wrote of all of them. Out: `duplicate_of` and spans.

May import: numpy, pyarrow, the room's words and steps; other libraries inside functions.
"""
