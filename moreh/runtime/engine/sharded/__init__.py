"""Shards a model over all ranks; a script then calls, trains, clips and saves it as if it were whole."""
