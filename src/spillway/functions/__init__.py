"""What users say about the shape of their messages: filter, routing and transform functions, built-in field operations,
envelopes. `base` is the contract; nothing here knows a sink, a store or a source."""
