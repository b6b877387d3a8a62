// What `python -m drifting.export` wrote beside the graph. onnxruntime-web does not show a file's metadata_props, which
// are its field 14, each a key and a value; all other fields of the protocol buffer are skipped.
export function metadata(bytes) {
  let at = 0;
  const number = () => {
    for (let value = 0, unit = 1; ; unit *= 128) {
      const byte = bytes[at++];
      value += (byte & 127) * unit;
      if (byte < 128) return value;
    }
  };
  const text = () => {
    number();  // the tag
    const size = number();
    return new TextDecoder().decode(bytes.subarray(at, at += size));
  };
  while (at < bytes.length) {
    const tag = number(), size = number();
    if (tag == 14 * 8 + 2 && text() == "drifting") return JSON.parse(text());
    if (tag % 8 == 2 && tag != 14 * 8 + 2) at += size;
  }
}
