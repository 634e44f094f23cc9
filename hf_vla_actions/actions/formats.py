"""Every statistics file of the field, read and written: detected by content, never by name, and never guessed.

`read_stats` and `write_stats` are the pair; `parse_stats` reads content in memory; FORMATS is the table of formats, each
with whose file it is and what follows for use. Per family: formats_datasets, formats_models, formats_lerobot,
formats_policy, formats_groot.
"""

from hf_vla_actions.actions.formats_reading import StatsFile, parse_stats, read_stats
from hf_vla_actions.actions.formats_table import FORMATS, Format, detect_format
from hf_vla_actions.actions.formats_writing import write_stats

__all__ = ["FORMATS", "Format", "StatsFile", "detect_format", "parse_stats", "read_stats", "write_stats"]
