"""Messages on their way out: documents, their cost, and the spool that keeps them."""
