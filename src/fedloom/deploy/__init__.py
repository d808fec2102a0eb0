"""One federation over several processes or machines: the server's side, a site's side, and what each is asked for."""
