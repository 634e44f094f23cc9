"""What the tables of a LeRobotDataset v3.0 look like: features, schema metadata, columns, tasks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SCALARS = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


def make_features(
    image_shapes: Mapping[str, tuple[int, ...]],
    state_names: Sequence[str] | None,
    action_names: Sequence[str],
    video_info: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The `features` of info.json, in the order of the columns.

    Args:
        image_shapes: (height, width, 3) of each camera, by full name.
        state_names: one name a dimension, or None without states.
        action_names: one name a dimension.
        video_info: codec, pixel format and rate where cameras are videos; None where they are pictures.
    """
    features: dict[str, Any] = {}
    for camera, shape in image_shapes.items():
        features[camera] = {"dtype": "image", "shape": list(shape), "names": ["height", "width", "channels"]}
        if video_info is not None:
            size = {"video.height": shape[0], "video.width": shape[1], "video.channels": shape[2]}
            features[camera] |= {"dtype": "video", "info": {**size, **video_info}}
    for key, names in (("observation.state", state_names), ("action", action_names)):
        if names is not None:
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
    return features | {key: {"dtype": dtype, "shape": [1], "names": None} for key, dtype in SCALARS.items()}


def huggingface_metadata(features: Mapping[str, Any]) -> dict[str, str]:
    """Schema metadata of the data files, by which `datasets` decodes pictures; videos are no columns."""

    def column(feature: Mapping[str, Any]) -> dict[str, Any]:
        if feature["dtype"] == "image":
            return {"_type": "Image"}
        value = {"dtype": feature["dtype"], "_type": "Value"}
        return (
            value if feature["names"] is None else {"feature": value, "length": feature["shape"][0], "_type": "List"}
        )

    columns = {key: column(feature) for key, feature in features.items() if feature["dtype"] != "video"}
    return {"huggingface": json.dumps({"info": {"features": columns}})}


def number_column(values: np.ndarray, key: str) -> Any:
    """Numbers (n, length) as a pyarrow column: plain for the bookkeeping scalars, lists of fixed size otherwise."""
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(values).ravel())
    return flat if key in SCALARS else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def picture_column(encoded: Sequence[bytes], suffix: str) -> Any:
    """Encoded pictures as a pyarrow struct{bytes, path}."""
    import pyarrow as pa

    paths = [f"frame-{step:06d}.{suffix}" for step in range(len(encoded))]
    return pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.array(paths, pa.string())], names=["bytes", "path"]
    )


def tasks_table(instructions: Sequence[str]) -> Any:
    """`tasks.parquet`: the text is the pandas index, so that pandas finds `task_index` by it."""
    import pyarrow as pa

    table = pa.table(
        {
            "task_index": pa.array(range(len(instructions)), pa.int64()),
            "__index_level_0__": pa.array(instructions, pa.large_string()),
        }
    )
    column = {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"}
    index = {"name": None, "field_name": "__index_level_0__", "pandas_type": "unicode", "numpy_type": "object"}
    pandas = {
        "index_columns": ["__index_level_0__"],
        "column_indexes": [
            {
                "name": None,
                "field_name": None,
                "pandas_type": "unicode",
                "numpy_type": "object",
                "metadata": {"encoding": "UTF-8"},
            }
        ],
        "columns": [{**column, "metadata": None}, {**index, "metadata": None}],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    return table.replace_schema_metadata({"pandas": json.dumps(pandas)})
