"""Functions of users: what comes of messages, and what poison costs."""
