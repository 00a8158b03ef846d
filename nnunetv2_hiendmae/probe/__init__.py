"""How well a linear map finds the organs of a labelled data set in an encoder's tokens."""
