"""Every statistics file of the field, read and written: detected by content, never by name, and never guessed.

`read_stats` and `write_stats` are the pair; `parse_stats` reads content in memory; FORMATS is the table of formats, each
with whose file it is and what follows for use. `document` is a file that was opened, `table`, `reading` and `writing` hold
for all formats; `datasets`, `models`, `lerobot`, `policy` and `groot` are the families.
"""

from hf_vla_actions.actions.formats.reading import StatsFile, parse_stats, read_stats
from hf_vla_actions.actions.formats.table import FORMATS, Format, detect_format
from hf_vla_actions.actions.formats.writing import write_stats

__all__ = ["FORMATS", "Format", "StatsFile", "detect_format", "parse_stats", "read_stats", "write_stats"]
