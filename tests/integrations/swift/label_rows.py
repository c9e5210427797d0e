"""ms-swift's own ids and labels of conversations, in its own environment.

    python label_rows.py jobs.json seen.json

`jobs.json` is a list of `{"name": …, "model": folder, "type": model type, "template": …, "rows": conversations}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from swift.model import get_processor
from swift.template import get_template


def own_labels(job: dict[str, Any]) -> list[Any]:
    """Of each conversation the row that ms-swift makes, or the name of its error."""
    template = get_template(get_processor(job["model"], model_type=job["type"]), template_type=job["template"])
    template.set_mode("train")
    made: list[Any] = []
    for row in job["rows"]:
        try:
            encoded = template.encode(row)
            made.append([list(encoded["input_ids"]), list(encoded["labels"])])
        except Exception as error:  # whatever it says of a row that it cannot read
            made.append(type(error).__name__)
    return made


if __name__ == "__main__":
    jobs, target = (Path(argument) for argument in sys.argv[1:])
    target.write_text(json.dumps({job["name"]: own_labels(job) for job in json.loads(jobs.read_text())}))
