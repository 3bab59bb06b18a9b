"""The server's log: lines for people, or a JSON object a line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from jaxllm.server.config import LogConfig


class JsonFormatter(logging.Formatter):
    """A record as a JSON object: time, level, logger, message, the fields of a request's line, an error."""

    def format(self, record: logging.LogRecord) -> str:
        """The record on one line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure(config: LogConfig) -> None:
    """Sends the log to stderr; uvicorn's lines about requests are left out, the server writes its own.

    Other packages' warnings and errors go there in the same form, as those of the one that sends traces.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if config.log_format == "json" else text)
    level = logging.getLevelNamesMapping()[config.log_level.upper()]
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)
    for name in ("jaxllm", "uvicorn"):
        logging.getLogger(name).setLevel(level)
    logging.getLogger("uvicorn.access").disabled = True
