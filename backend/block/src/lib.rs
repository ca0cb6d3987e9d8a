//! What a storage function stands on: the volume and channel traits, requests, errors, ram and null volumes
