"""A tabletop world, an expert, a tiny model: the whole path, learned and judged in minutes anywhere."""
