"""Work over whole sources: measuring, converting, checking, counting."""
