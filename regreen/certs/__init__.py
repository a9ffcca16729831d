"""A certificate authority of one's own: who a service or a client is, for mutual TLS."""
