"""gradmon in what people train with: each module imports its library, and nothing else imports it."""
