"""The bus on a Redis-protocol server (Redis or Valkey, 6.2 or newer)."""
