"""Architectures as data: specs made from config.json, the table of shards, one decoder for all."""
