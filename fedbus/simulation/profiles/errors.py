"""Errors of profiles."""


class ProfileError(ValueError):
    """A profile is invalid. The text names the file, the line, the key, the value and the valid values."""


class ProfileMissing(ProfileError):
    """There is no such file or built-in profile."""
