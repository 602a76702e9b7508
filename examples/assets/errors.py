"""What can go wrong while an asset is made, said for the person who asked for it."""


class AssetError(RuntimeError):
    """An asset could not be made; the message says what was needed, what failed and what to do."""


class PackageUnavailableError(AssetError):
    """The package that carries the asset could not be obtained: no client, or no network."""
