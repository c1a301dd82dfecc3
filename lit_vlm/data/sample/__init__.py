"""From a record to ids, labels and pixels: templates, transforms, encoding, collation."""
