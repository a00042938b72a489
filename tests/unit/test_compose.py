"""docker-compose.yml, where a mistake shows only on a machine with Docker."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

COMPOSE = Path(__file__).parents[2] / "docker-compose.yml"
VERSION_18_DATA = "/var/lib/postgresql/18/docker"


def keeps_its_database(service: dict[str, Any]) -> bool:
    """Whether PostgreSQL 18 starts, and its data outlive the container: they are in a volume.

    Its image takes a volume on /var/lib/postgresql/data for one of an older version, and stops, unless PGDATA says so.
    """
    data = PurePosixPath(service.get("environment", {}).get("PGDATA", VERSION_18_DATA))
    mounts = [PurePosixPath(volume.split(":")[1]) for volume in service.get("volumes", ())]
    return any(data.is_relative_to(mount) for mount in mounts)


def test_the_database_of_the_profile_dcm4chee_starts_and_is_kept() -> None:
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    assert ":18" in services["db"]["image"]
    assert keeps_its_database(services["db"])
    given = services["db"]["environment"]
    login = {name: given[name] for name in ("POSTGRES_DB", "POSTGRES_USER", "POSTGRES_PASSWORD")}
    assert login.items() <= services["arc"]["environment"].items(), "what the archive logs in with"


@pytest.mark.parametrize(
    ("service", "keeps"),
    [
        ({"volumes": ["d:/var/lib/postgresql/data"]}, False),
        ({"volumes": ["d:/var/lib/postgresql"]}, True),
        ({"volumes": ["d:/var/lib/postgresql/data"], "environment": {"PGDATA": "/var/lib/postgresql/data"}}, True),
        ({"volumes": ["d:/var/lib/postgresql/data"], "environment": {"PGDATA": "/srv/data"}}, False),
    ],
)
def test_a_volume_somewhere_else_would_be_noticed(service: dict[str, Any], keeps: bool) -> None:
    assert keeps_its_database(service) is keeps
