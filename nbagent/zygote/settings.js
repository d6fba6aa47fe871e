// JupyterLab validates the settings of every plugin and fills in their defaults by ajv, which compiles two functions for
// each schema: a tenth of a page's time. Each function runs once, because a new slot's settings are empty. Here empty
// settings get the same result from an interpreter. ajv does it if a schema has a keyword that the interpreter does not
// have, and if a default is not valid.
const ANNOTATIONS = ["$comment", "$schema", "default", "definitions", "description", "deprecated", "examples", "title"];
const DRAFT_7 = /^http:\/\/json-schema\.org\/draft-07\/schema#?$/;
const typeOf = value => (value === null ? "null" : Array.isArray(value) ? "array" : typeof value);
const copyOf = value => JSON.parse(JSON.stringify(value));

// Whether `value` is valid by a schema of the document `root`. Absent properties get their defaults by ajv's rules of
// useDefaults: none (`fill`) for the settings of a user, and none below oneOf, except behind a reference to a schema
// with references, which ajv compiles to a function of its own.
function isValid(value, schema, root, fill, below = fill) {
  if (schema === true) return true;
  if (typeOf(schema) !== "object") throw new Error("unsupported schema");
  const type = typeOf(value), { properties = {}, patternProperties = {} } = schema;
  const patterns = Object.entries(patternProperties).map(([text, rule]) => [new RegExp(text, "u"), rule]);
  const valid = (part, rule, fills = below) => isValid(part, rule, root, fill, fills);
  if (below && type === "object") {
    for (const name in properties) {
      if (value[name] === undefined && properties[name].default !== undefined) {
        value[name] = copyOf(properties[name].default);
      }
    }
  }
  const rules = {
    type: types => [types].flat().some(one => one === type || (one === "integer" && Number.isInteger(value))),
    const: wanted => equal(value, wanted),
    enum: wanted => wanted.some(one => equal(value, one)),
    minimum: limit => type !== "number" || value >= limit,
    maximum: limit => type !== "number" || value <= limit,
    minLength: limit => type !== "string" || [...value].length >= limit,
    pattern: text => type !== "string" || new RegExp(text, "u").test(value),
    required: names => type !== "object" || names.every(name => value[name] !== undefined),
    properties: () => type !== "object" || Object.keys(properties).every(
      name => value[name] === undefined || valid(value[name], properties[name])),
    patternProperties: () => type !== "object" || patterns.every(([pattern, rule]) => Object.keys(value).every(
      name => !pattern.test(name) || valid(value[name], rule))),
    additionalProperties: rule => type !== "object" || Object.keys(value).every(
      name => name in properties || patterns.some(([pattern]) => pattern.test(name)) ||
        (rule !== false && valid(value[name], rule))),
    items: rule => type !== "array" || value.every(item => valid(item, rule)),
    uniqueItems: unique => type !== "array" || !unique || new Set(value.map(simple)).size === value.length,
    allOf: all => all.every(rule => valid(value, rule)),
    oneOf: all => all.filter(rule => isOne(valid, value, rule)).length === 1,
    $ref: path => {
      const target = referred(path, root);
      return valid(value, target, below || (fill && JSON.stringify(target).includes('"$ref":')));
    },
  };
  return Object.keys(schema).every(keyword => {
    if (Object.hasOwn(rules, keyword)) return rules[keyword](schema[keyword]);
    if (keyword === "$schema" && !DRAFT_7.test(schema.$schema)) throw new Error("unsupported dialect");
    if (ANNOTATIONS.includes(keyword) || keyword.startsWith("jupyter.lab.")) return true;
    throw new Error(`unsupported keyword ${keyword}`);
  });
}

function isOne(valid, value, rule) {
  const before = JSON.stringify(value);
  const found = valid(value, rule, false);
  // What ajv has filled in before it found the fault depends on its order.
  if (!found && JSON.stringify(value) !== before) throw new Error("unsupported defaults");
  return found;
}

function simple(value) {
  if (typeof value === "object" && value !== null) throw new Error("unsupported comparison");
  return value;
}

function equal(one, other) {
  return one === simple(other);
}

function referred(path, root) {
  const name = /^#\/definitions\/([\w-]+)$/.exec(path)?.[1];
  if (!Object.hasOwn(root.definitions ?? {}, name)) throw new Error(`unsupported reference ${path}`);
  return root.definitions[name];
}

// The defaults as text, or null if ajv has to look for itself.
function defaultsOf(schema) {
  try {
    const composite = {};
    if (schema.type === "object" && isValid({}, schema, schema, false) && isValid(composite, schema, schema, true)) {
      return JSON.stringify(composite);
    }
  } catch {}
  return null;
}

function interpretEmptySettings(validator) {
  const { validateData, _validator } = validator;
  const isSchema = _validator?.getSchema?.("jupyterlab-plugin-schema");
  if (!validateData || !isSchema) return;
  // By plugin. JupyterLab keeps the first schema, even if the plugin changes it later.
  const known = new Map();
  validator.validateData = function (plugin, populate = true) {
    const isEmpty = /^\s*\{\s*\}\s*$/.test(plugin.raw);
    if (isEmpty && populate && !known.has(plugin.id)) {
      const { schema } = plugin, found = isSchema(schema) && _validator.validateSchema(schema) ? defaultsOf(schema) : null;
      known.set(plugin.id, found && { schema: copyOf(schema), composite: found });
    }
    const first = known.get(plugin.id);
    if (!first) return validateData.call(this, plugin, populate);
    if (isEmpty && populate) {
      plugin.data = { composite: JSON.parse(first.composite), user: {} };
      return null;
    }
    const copy = { ...plugin, schema: first.schema };
    const errors = validateData.call(this, copy, populate);
    if (copy.data) plugin.data = copy.data;
    return errors;
  };
}

// The registry validates the settings when it is made. `Later` lets it wait until its validator has been replaced.
function quickenSettings(plugin) {
  const { activate } = plugin;
  plugin.activate = async (app, connector, ...services) => {
    if (!connector?.list) return activate(app, connector, ...services);
    let replaced;
    const wait = new Promise(resolve => (replaced = resolve));
    class Later extends Array {
      map(act) {
        return super.map(async item => (await wait, act(item)));
      }
    }
    const { list } = connector;
    connector.list = async (...query) => {
      connector.list = list;
      const found = await connector.list(...query);
      return { ...found, values: Later.from(found.values) };
    };
    try {
      const registry = await activate(app, connector, ...services);
      interpretEmptySettings(registry.validator);
      bindShortcutsTogether(registry);
      return registry;
    } finally {
      replaced();
    }
  };
}
