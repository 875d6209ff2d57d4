"""The commands and what they share: configuration, folders, errors."""
