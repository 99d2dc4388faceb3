"""Load traces of other frameworks. NumPy only; one file here for each system.

counts.py and arrays.py make a Trace of what they find, limits.py has what is too much, formats.py
which reader takes a file.
"""

from pangu_locmoe.expert_load.importing.formats import FORMATS, import_trace

__all__ = ["FORMATS", "import_trace"]
