"""The name that `courier.settings` had in version 0.1: ``Courier(Settings.load(…))`` was written with it."""

from courier.settings import Settings, SettingsError

__all__ = ["Settings", "SettingsError"]
