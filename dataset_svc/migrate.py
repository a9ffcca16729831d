"""`python -m dataset_svc.migrate`: brings the schema of `database_url` to the newest, and ends.

- The service does the same at its start, under the same lock; before an upgrade this does it once,
  where its end can be waited for.
- Reads the settings of the dataset service, from file, environment and flags.
"""

import sys

from dataset_svc.database import await_server, upgrade
from dataset_svc.settings import DatasetSettings
from regreen.rpc import logging
from regreen.rpc.errors import RegreenError
from regreen.settings import BAD_SETTINGS


def main(argv: list[str] | None = None) -> int:
    """Migrate; the exit code."""
    settings = DatasetSettings.load(argv)
    logging.configure("dataset", settings.log_level)
    if not settings.database_url:
        sys.stderr.write(
            "dataset_svc.migrate: database_url: is empty; a private Postgres is migrated by the "
            "service that owns it, so give the URL of another\n"
        )
        return BAD_SETTINGS
    try:
        await_server(settings.database_url, settings.database_wait_s)
        upgrade(settings.database_url)
    except RegreenError as error:
        sys.stderr.write(f"dataset_svc.migrate: {error}\n")
        return 1
    logging.get().info("migrated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
