"""Clients at sites that Flower connects. Only `app` and `node` import it."""
