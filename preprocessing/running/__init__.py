"""How a conversion runs: parts, worker pool, work folder, storage, progress."""
