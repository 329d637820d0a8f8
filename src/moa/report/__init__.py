"""Self-contained HTML pages from saved results: no network, no scripts from elsewhere."""
