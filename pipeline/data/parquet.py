"""Lists of photos and captions in Parquet, as Hugging Face's data sets have them; read by pyarrow, an extra."""

import io
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import UserError

COLUMNS = "file_name", "text", "caption", "conditioning_image"
"""The columns that are read; others, such as pixels, are left in the file."""


def rows(path: Path, content: bytes) -> Iterator[tuple[int, dict]]:
    """The number of each row, from 1, and its cells by column, without those that are empty.

    Raises UserError where pyarrow is missing, or where this is no Parquet file with a column file_name.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: needs pyarrow; pip install 'mindspore-flux-finetune[parquet]'") from None
    try:
        file = parquet.ParquetFile(io.BytesIO(content))
        there = file.schema_arrow.names
        if "file_name" not in there:
            found = ", ".join(there)[:200] or "none"
            raise UserError(f"{path}: its columns are {found}; expected file_name among them")
        number = 0
        for batch in file.iter_batches(columns=[name for name in COLUMNS if name in there]):
            for row in batch.to_pylist():
                number += 1
                yield number, {name: cell for name, cell in row.items() if cell is not None}
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}") from None
