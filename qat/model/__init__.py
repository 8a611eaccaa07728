"""From a timm net to a quantized one and back to a file: conversion, scales, checkpoints, cost."""
