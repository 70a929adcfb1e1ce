"""Documents from files and hubs, encoded into shards."""
